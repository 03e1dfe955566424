"""Training: settings, the trainer that survives being killed, what the stages share, and the stages."""
