"""The HTTP API, a drop-in for OpenAI's and Anthropic's. Rooms: errors, keys, schemas, requests, running, openai, ..., server."""
