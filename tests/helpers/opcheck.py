"""What `torch.library.opcheck` tests of our operators."""

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
