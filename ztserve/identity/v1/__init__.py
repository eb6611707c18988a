"""Generated from ``proto/ztserve/identity/v1`` by ``make proto``; never edited."""
