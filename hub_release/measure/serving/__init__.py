"""The server under load and faults: `python -m hub_release.measure.serving`."""
