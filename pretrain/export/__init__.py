"""What leaves keel: folders that timm, the hub and open_clip open, checked by a fresh process, with a card.

Here belongs what writes or opens such a folder. What timm builds is `encoders`, what a checkpoint holds
`run.trained`.
"""
