"""Find LoRA configurations of Higgs Audio V2 that make text use audio."""
