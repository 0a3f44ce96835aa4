"""Property tests of the functions that exercises/blank.py takes out: what must hold, with a message for each."""
