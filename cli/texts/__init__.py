"""What a verb prints, as text and as plain values."""
