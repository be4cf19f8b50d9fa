"""The classic recipe as a person writes it in one sitting: no cache, VGG16 runs over every image in every epoch.

The yardstick for Attire's times; nothing of Attire is used but the file of weights.

    python benchmarks/plain_script.py fashion-mnist_train.csv vgg16-features.safetensors --rows 400 --epochs 1
"""

import argparse
import time

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms


class FashionDataset(Dataset):
    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.Resize((224, 224)),
                transforms.ToTensor(),
                transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.frame.iloc[index]
        image = row.iloc[1:].to_numpy(dtype=np.uint8).reshape(28, 28)
        return self.transform(np.stack([image] * 3, axis=-1)), int(row.iloc[0])


def make_model(weights: dict[str, torch.Tensor]) -> nn.Module:
    model = models.vgg16(weights=None)
    model.features.load_state_dict({k.removeprefix("features."): v for k, v in weights.items()})
    for parameter in model.features.parameters():
        parameter.requires_grad = False
    model.classifier = nn.Sequential(
        nn.Linear(25088, 1024),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(1024, 512),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(512, 10),
    )
    return model


def train_epoch(
    model: nn.Module, loader: DataLoader, criterion: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> float:
    model.train()
    total = 0.0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv")
    parser.add_argument("weights")
    parser.add_argument("--rows", type=int, help="only the first rows of the file")
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    torch.manual_seed(42)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = train_test_split(pd.read_csv(given.csv, nrows=given.rows), test_size=0.2, random_state=42)
    train_loader = DataLoader(FashionDataset(train), batch_size=32, shuffle=True)
    test_loader = DataLoader(FashionDataset(test), batch_size=32)

    model = make_model(load_file(given.weights)).to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=1e-4)

    for epoch in range(given.epochs):
        began = time.perf_counter()
        loss = train_epoch(model, train_loader, criterion, optimizer, device)
        seconds = time.perf_counter() - began
        rate = len(train) / seconds
        print(f"epoch {epoch + 1}: average loss {loss:.4f}, {seconds:.1f} s, {rate:.2f} images/s")

    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in test_loader:
            right += (model(images.to(device)).argmax(1).cpu() == labels).sum().item()
    print(f"test accuracy {100 * right / len(test):.2f} % (n = {len(test):,})")


if __name__ == "__main__":
    main()
