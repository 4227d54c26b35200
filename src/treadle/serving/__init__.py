"""Models behind HTTP: the OpenAI protocol, a chat page, many models and adapters, A/B tests."""
