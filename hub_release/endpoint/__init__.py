"""What a hosted endpoint needs beside a model: `handler.py` and `requirements.txt`, copied by `build.py --handler`."""
