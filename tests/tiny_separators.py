"""A tiny configuration of every separator that has a tap."""

STFT = {"n_fft": 128, "hop_length": 64}
CONV = {"channel": 16, "kernel_size": 16, "stride": 8}
RNN = {"rnn_type": "blstm", "layer": 2, "unit": 8}
ATTENTION = {"adim": 8, "aheads": 2, "layers": 2, "linear_units": 8}
DUAL_PATH = {"layer": 2, "unit": 8, "segment_size": 8}
GRID = {"n_layers": 2, "lstm_hidden_units": 4, "attn_n_head": 2, "emb_dim": 4,
        "emb_ks": 2, "emb_hs": 1}  # fmt: skip
USES = {"enc_channels": 8, "bottleneck_size": 4, "num_blocks": 1, "num_spatial_blocks": 0,
        "segment_size": 8, "memory_size": 2, "hidden_size": 4, "att_heads": 2}  # fmt: skip

# Encoder and decoder, and `separator_conf` without `num_spk`, which is 1 everywhere.
SEPARATORS: dict[str, tuple[str, dict]] = {
    "rnn": ("stft", {**RNN}),
    "tcn": ("conv", {"layer": 2, "stack": 2, "bottleneck_dim": 8, "hidden_dim": 8}),
    "transformer": ("stft", ATTENTION),
    "conformer": ("stft", ATTENTION),
    "skim": ("conv", {"layer": 2, "unit": 8, "segment_size": 8, "causal": False}),
    "dc_crn": ("stft", {"input_channels": [2, 4, 8], "enc_layers": 2, "enc_hid_channels": 4}),
    "dccrn": ("stft", {"rnn_units": 8, "kernel_num": [4, 8]}),
    "bsrnn": ("stft", {"num_channels": 4, "num_layers": 2, "target_fs": 16000,
                        "norm_type": "cfLN", "subbands": [[0, 7], [8, 23], [24, 64]]}),
    "tfgridnet": ("same", {**GRID, "n_fft": 128, "stride": 64, "attn_approx_qk_dim": 64}),
    "tfgridnetv2": ("same", {**GRID, "n_fft": 128, "stride": 64, "attn_approx_qk_dim": 64}),
    "tfgridnetv3": ("stft", GRID),
    "uses": ("stft", USES),
    "uses2": ("stft", {**USES, "tf_mode": "comp", "input_resolution": [70, 8]}),
    "dprnn": ("conv", DUAL_PATH),
    "dptnet": ("conv", {**DUAL_PATH, "att_heads": 2}),
    "svoice": ("same", {"enc_dim": 64, "kernel_size": 8, "hidden_size": 4, "num_layers": 2,
                        "segment_size": 8}),
    "dpcl_e2e": ("stft", {**RNN, "emb_D": 2, "max_iteration": 2, "threshold": 0.0,
                           "predict_noise": True}),
    "blstm_sum": ("stft", {"unit": 8}),
    "dense_dual_path": ("stft", {"channels": 4, "layers": 2, "heads": 2, "dense_depth": 1,
                                 "unit": 4}),
    "mp_senet": ("stft", {"channels": 4, "blocks": 2, "heads": 2, "dense_depth": 1, "kernel": 3}),
    "gtcrn": ("stft", {"channels": 4}),
}  # fmt: skip


def separator_config(name: str) -> dict:
    """Return the keys of the parts of a model.

    Args:
        name: of the separator.
    """
    coder, conf = SEPARATORS[name]
    parts = {"stft": STFT, "conv": CONV, "same": {}}[coder]
    speakers = {"n_srcs": 1} if name.startswith("tfgridnet") else {"num_spk": 1}
    if name in ("blstm_sum", "dense_dual_path"):  # know no other number
        speakers = {}
    criterion, wrapper = ("si_snr", "fixed_order") if coder != "stft" else ("l1_fd", "fixed_order")
    if name == "svoice":  # gives the output of every block
        wrapper = "multilayer_pit"
    return {
        "encoder": coder,
        "encoder_conf": parts,
        "decoder": coder,
        "decoder_conf": parts,
        "separator": name,
        "separator_conf": {**speakers, **conf},
        "criterions": [{"name": criterion, "conf": {}, "wrapper": wrapper, "wrapper_conf": {}}],
        "mask_module": "multi_mask",
        "mask_module_conf": {},
        "model_conf": {},
        "init": None,
        "num_spk": 1,
        "sample_rate": 16000,
    }
