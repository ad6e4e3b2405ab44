// What an upload holds, read in the browser before anything is sent: a safetensors file's header, PEFT's config.

const MAX_HEADER_BYTES = 1 << 20;
const CONFIG_NAME = "adapter_config.json";
const WEIGHTS = /\.safetensors$/;

/** Sort files into uploads: one for each safetensors file, with the PEFT config that lies beside it. */
export async function readUploads(files) {
  const uploads = [];
  for (const { path, file } of files.filter((one) => WEIGHTS.test(one.path))) {
    const folder = path.slice(0, path.lastIndexOf("/") + 1);
    const config = files.find((one) => one.path === `${folder}${CONFIG_NAME}`) ?? null;
    const isPeft = /adapter_model\.safetensors$/.test(path);
    const parts = folder.split("/").filter(Boolean);
    const name = isPeft ? (parts.at(-1) ?? "") : path.slice(folder.length).replace(WEIGHTS, "");
    uploads.push({ name: nameFrom(name), path, file, header: await readHeader(file), config: config && (await readConfig(config.file)) });
  }
  return uploads;
}

/** A name that the server takes. */
function nameFrom(text) {
  return text.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 96) || "my-prompt";
}

async function readHeader(file) {
  try {
    const size = Number(new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true));
    if (!(size > 1 && size <= MAX_HEADER_BYTES)) throw new Error("no safetensors header");
    const header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(await file.slice(8, 8 + size).arrayBuffer()));
    const { __metadata__: metadata = {}, ...tensors } = header;
    return { tensors: Object.entries(tensors).map(([name, { dtype, shape }]) => ({ name, dtype, shape })), metadata };
  } catch {
    return null; // the server says what is wrong with it
  }
}

async function readConfig(file) {
  const text = await file.text();
  try {
    return { text, fields: JSON.parse(text) };
  } catch {
    return { text, fields: null };
  }
}

/** The PEFT config as the header of an upload carries it. */
export function configHeader(config) {
  const binary = [...new TextEncoder().encode(config.text)].map((one) => String.fromCharCode(one)).join("");
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}
