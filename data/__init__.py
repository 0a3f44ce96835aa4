"""Data: text and tokens, data sets, weights on disk, and the offline world in `barn`."""


class InputError(ValueError):
    """Something that the user gave cannot be used; the message is one sentence that says what and what to try."""
