"""Trained models at work on one scan: conversation, out-of-distribution detection, saliency."""
