"""HTTP: OpenAI's wire format over the engine. Never a tensor."""
