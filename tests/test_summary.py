"""What a run says of itself at its start."""

import train_ncp_dpo
from ncp.common.config import parse
from ncp.training.summary import describe_loss


def test_beta_is_announced_in_both_conventions():
    paths = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    config = parse(train_ncp_dpo.Config, paths)
    said = describe_loss(config, "auto")
    assert "beta 2500 " in said and "5000" in said and "derivative over 0.016" in said
    assert "eq. 13 as printed" in describe_loss(config, "1")


def test_the_remedies_against_collapse_are_announced():
    paths = ["--pretrained_model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    plain = describe_loss(parse(train_ncp_dpo.Config, paths), "1")
    keys = ["--winner_preserving_mu", "0", "--soft_labels", "--reference_decay", "0.99"]
    said = describe_loss(parse(train_ncp_dpo.Config, [*paths, *keys]), "1").removeprefix(plain)
    assert "preserve winners, mu 0" in said and "soft labels" in said and "decay 0.99" in said
    linear = describe_loss(parse(train_ncp_dpo.Config, [*paths, "--utility", "linear", "--eta", "0.1"]), "1")
    assert linear.removeprefix(plain) == "; linear utility, eta 0.1"
