"""What is known of the heads and losses of each host; a file is imported only where its host is."""
