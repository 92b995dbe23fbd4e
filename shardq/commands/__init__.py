"""What each verb does: a page each, and what they share."""
