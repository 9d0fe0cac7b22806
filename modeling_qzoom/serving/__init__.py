"""A server that answers OpenAI-compatible requests with a Q-Zoom model: `python -m modeling_qzoom.serving MODEL`.

Needs the extra `serve`. `serve run modeling_qzoom.serving.deployment:build_app model=FOLDER` starts the same server on
a Ray cluster.
"""
