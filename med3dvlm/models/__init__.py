"""The models: Med3DCLIP (clip.py) and Med3DVLM (vlm.py), each with the processor that prepares its inputs."""
