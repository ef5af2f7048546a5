"""What the fields of a sample are called, as far as a manifest doesn't say otherwise."""

# Of what decode.py reads, each ending that such files have; what others packed keeps its name.
IMAGE_FIELDS = (
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "jpe", "jfif", "pjpeg", "mpo", "apng", "pgm", "pbm"),
    *("pnm", "tif", "tiff", "avif", "avifs", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
)
LABEL_FIELDS = ("cls",)
CAPTION_FIELDS = ("txt", "json")
