"""Tables that describe architectures, and the empty model they describe. No arithmetic."""
