"""What a client does with a head: local training and evaluation on cached features."""
