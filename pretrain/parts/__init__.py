"""What objectives are built from: heads, queues, teachers, grouped batch norm, augmentation on the device.

Here belongs what a second objective uses too and what knows no objective. A loss goes to `losses`, what timm
builds to `encoders`, a whole method to `objectives`.
"""
