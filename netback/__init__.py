"""The network backend: what a guest's netfront talks to.

request    pure: the slots of a packet from a guest -> a checked plan
"""
