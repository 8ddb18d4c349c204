"""The two reserved names that MODEL and SRC accept in place of a file or a Hub id: `demo` and `self`."""

DEMO = "demo"  # the embedded teacher, or its generated text
SELF = "self"  # text sampled from the teacher
