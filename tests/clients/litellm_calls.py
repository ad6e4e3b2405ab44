"""What LiteLLM does with a promptd server, in an interpreter that has it; prints one JSON line for the test."""

import asyncio
import json
import sys

import litellm
import openai

base, key = sys.argv[1:]
server = {"api_base": base, "api_key": key}
litellm.suppress_debug_info = True
asked = {"model": "text-completion-openai/soft", "prompt": "the quick brown", "max_tokens": 8, "temperature": 0}
asked["extra_body"] = {"ignore_eos": True}
whole = litellm.text_completion(**asked, **server)
streamed = litellm.text_completion(**asked, **server, stream=True)
seen = {
    "text": whole.choices[0].text,
    "usage": whole.usage.completion_tokens,
    "streamed": "".join(event.choices[0].text or "" for event in streamed),
    "bare": litellm.text_completion(**{**asked, "model": "text-completion-openai/tiny"}, **server).choices[0].text,
    "errors": [],
}
for changed in ({"model": "text-completion-openai/nobody"}, {"temperature": 9}):
    try:
        litellm.text_completion(**{**asked, **changed}, **server)
    except openai.APIStatusError as error:  # LiteLLM's own are subclasses of OpenAI's
        seen["errors"].append([type(error).__name__, error.status_code])
router = litellm.Router(
    model_list=[{"model_name": "team", "litellm_params": {"model": "text-completion-openai/soft", **server}}]
)
routed = asyncio.run(router.atext_completion(**{**asked, "model": "team"}))
seen["routed"] = routed.choices[0].text
print(json.dumps(seen))
