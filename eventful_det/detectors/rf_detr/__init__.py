"""RF-DETR of `transformers` and of the package `rfdetr`, eventful."""
