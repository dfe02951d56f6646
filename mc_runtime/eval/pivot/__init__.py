"""A conversation that turns from one topic to another and back: does focus follow, and does an update win?"""
