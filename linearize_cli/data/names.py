"""Names of models and text sources that are not files."""

DEMO = "demo"  # the embedded teacher, or its generated text
SELF = "self"  # text sampled from the teacher
