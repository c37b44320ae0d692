"""What ours is measured beside: drivers of other programs, and the same work written for them."""
