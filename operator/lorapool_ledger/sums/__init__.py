"""What is made of the facts: sums by hour and day, the reconciliation, and the end of the facts' retention."""
