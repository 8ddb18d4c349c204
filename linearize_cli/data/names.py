"""Names of models and text sources that are no files."""

DEMO = "demo"  # the embedded teacher, and the text that comes with it
SELF = "self"  # text sampled from the model itself
