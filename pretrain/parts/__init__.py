"""What objectives are built from: heads, queues, teachers, batch norm over groups, the device half of augmentation.

Here belongs what a second objective uses too and what knows no objective. A loss goes to `losses`, what timm
builds to `encoders`, a whole method to `objectives`.
"""
