"""What a policy meets: text tasks here."""
