"""Errors: who has to act tells them apart, so that a server can answer 400 or 500. All of them are `ValueError`s."""


class QZoomError(ValueError):
    """Any error of this library; the message names the cause and the way out."""


class InputError(QZoomError):
    """What the caller passed is malformed, out of range, or does not fit together."""


class UnsupportedError(InputError):
    """A feature that the caller asked for cannot go with this model or with zooming."""


class CropError(InputError):
    """A region that no crop can be made of; `generate` then answers the row from the coarse view."""


class CheckpointError(QZoomError):
    """A checkpoint, a configuration or an add-on is damaged, incomplete, or belongs to another model."""
