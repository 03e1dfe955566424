"""The chat over a scan in the browser. `app/chat.py` and `med3dvlm chat` start it."""
