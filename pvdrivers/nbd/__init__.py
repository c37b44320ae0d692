"""Network Block Device: a server for anything that can be read and written by blocks.

wire         the protocol's numbers and messages, pure
negotiation  the fixed newstyle handshake of one connection
connection   the requests of one connection
server       the socket, and the connections
"""
