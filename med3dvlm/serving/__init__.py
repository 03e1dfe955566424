"""A server for programs with OpenAI's API. `med3dvlm serve` starts it; docs/serving.md says how to ask it."""
