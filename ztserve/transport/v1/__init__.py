"""Generated from ``proto/ztserve/transport/v1`` by ``make proto``; never edited."""
