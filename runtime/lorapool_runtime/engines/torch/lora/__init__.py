"""The LoRA layer and its slots: where each adapter's matrices are stored and which kernel adds them to which rows."""
