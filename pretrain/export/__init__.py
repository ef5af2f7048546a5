"""What leaves keel: folders that timm, the hub and open_clip open, checked by a fresh process, and their cards.

Here belongs what writes or opens such a folder. What timm builds is `encoders`; what a checkpoint holds is `run.trained`.
"""
