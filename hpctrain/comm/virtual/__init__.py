"""Virtual ranks: many ranks as coroutines of one process, on a virtual clock."""
