"""Generated from ``proto/ztserve/doors/v1`` by ``make proto``; never edited."""
