"""Rewards for what is seen in pictures. Each module loads its own dependencies, so a short answer needs none.

In all of them an answer that cannot be read is worth 0, and a reference that cannot be read is a failure of the data.
Repetition does not pay: an answer with ten times what the reference has is worth 0.
"""
