"""Makes and checks repositories of the Hub.

`build.py`, `verify.py`, `push.py` and `convert_official.py` are called as files; everything else as a module from the
repository's root, such as `python -m hub_release.measure.memory`.
"""
