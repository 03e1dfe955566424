"""The server that programs speak to, in the words of OpenAI's API. `med3dvlm serve` starts it; docs/serving.md says how to ask it."""
