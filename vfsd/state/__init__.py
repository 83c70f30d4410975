"""What outlives the server of a guest: the memory it is in, and what is known of each request."""
