/* Libraries that torch_npu is linked with and of which it calls nothing that tests reach. */
typedef int nothing;
