"""The Hopper backend (sm_90a): TMA, wgmma and specialised warps, written in Gluon, which ships with Triton."""
