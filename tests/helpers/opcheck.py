"""`torch.library.opcheck` runs these tests on our operators."""

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
