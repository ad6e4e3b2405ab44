// What the `openai` package of npm does with a promptd server; prints one JSON line, which the test reads.
import fs from "node:fs";
import OpenAI from "openai";

const [baseURL, apiKey, rows] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const seen = {};

seen.models = [];
for await (const model of client.models.list()) seen.models.push(model.id);

const asked = { model: "soft", prompt: "the quick brown", max_tokens: 8, temperature: 0, ignore_eos: true };
const whole = await client.completions.create({ ...asked, logprobs: 2 });
seen.text = whole.choices[0].text;
seen.versions = whole.prompt_versions;
seen.virtual = whole.usage.prompt_tokens_details.virtual_tokens;
seen.logprobs = whole.choices[0].logprobs.token_logprobs.length;

seen.streamed = "";
const stream = await client.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } });
for await (const event of stream) {
  if (event.choices.length) seen.streamed += event.choices[0].text;
  else seen.usage = event.usage.completion_tokens;
}

const aborted = await client.completions.create({ ...asked, max_tokens: 40, stream: true });
for await (const event of aborted) break; // closes the connection
seen.bare = (await client.completions.create({ ...asked, model: "tiny" })).choices[0].text;

seen.labels = (
  await client.post("/classify", { body: { model: "soft", input: ["a", "b"], labels: [" fox", " dog"] } })
).data.map((one) => one.probs.length);

seen.errors = [];
for (const body of [{ ...asked, model: "nobody" }, { ...asked, temperature: 9 }, { ...asked, unheard: 1 }]) {
  try {
    await client.completions.create(body);
  } catch (error) {
    seen.errors.push([error.constructor.name, error.status, error.param]);
  }
}
try {
  await new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 }).models.list();
} catch (error) {
  seen.errors.push([error.constructor.name, error.status, error.param]);
}

const file = await client.files.create({ file: fs.createReadStream(rows), purpose: "fine-tune" });
const method = { type: "prompt_tuning", prompt_tuning: { hyperparameters: { num_steps: 2, batch_size: 2, num_virtual_tokens: 2 } } };
let job = await client.fineTuning.jobs.create({ model: "tiny", training_file: file.id, suffix: "by-node", method, publish_worse: true });
while (["queued", "running"].includes(job.status)) {
  await new Promise((resolve) => setTimeout(resolve, 100));
  job = await client.fineTuning.jobs.retrieve(job.id);
}
seen.job = [job.status, job.fine_tuned_model];
seen.events = [];
for await (const event of client.fineTuning.jobs.listEvents(job.id)) seen.events.push(event.message);
seen.learned = (await client.completions.create({ ...asked, model: "by-node" })).choices.length;

console.log(JSON.stringify(seen));
