import numpy as np

from evaluation.confusion_groups import BothWays, cluster_order, confused_both_ways, confused_groups


def matrix_with_groups(groups, num_classes, within=5, right=40):
    matrix = right * np.eye(num_classes, dtype=np.int64)
    for group in groups:
        for a in group:
            for b in group:
                if a != b:
                    matrix[a, b] = within
    return matrix


def test_classes_that_are_taken_for_each_other_become_neighbours():
    groups = [(0, 7, 14), (1, 8, 15), (2, 9, 16)]
    order = cluster_order(matrix_with_groups(groups, 20)).tolist()
    assert sorted(order) == list(range(20))
    for group in groups:
        places = sorted(order.index(label) for label in group)
        assert places[2] - places[0] == 2


def test_groups_are_found_most_confusions_first_and_no_class_twice():
    matrix = matrix_with_groups([(0, 50, 90), (3, 40, 60, 80)], 100, right=50)
    matrix[10, 11] = 30  # a pair is no group
    found = confused_groups(matrix, limit=5)
    assert [group.labels for group in found] == [(3, 40, 60, 80), (0, 50, 90)]
    assert found[0].count == 12 * 5 and found[0].fraction == 60 / (4 * 65)
    assert len(confused_groups(matrix, limit=1)) == 1
    labels = [label for group in confused_groups(np.ones((30, 30), np.int64), 10) for label in group.labels]
    assert len(labels) == len(set(labels))


def test_direction_does_not_hide_a_group():
    matrix = 10 * np.eye(6, dtype=np.int64)
    matrix[0, 5] = matrix[5, 3] = 10  # one way each
    order = cluster_order(matrix).tolist()
    assert abs(order.index(0) - order.index(5)) == 1


def test_a_perfect_model_and_few_classes_keep_their_order():
    for num_classes in (1, 2, 5):
        matrix = 3 * np.eye(num_classes, dtype=np.int64)
        assert cluster_order(matrix).tolist() == list(range(num_classes))
        assert confused_groups(matrix, 3) == [] and confused_both_ways(matrix, 3) == []
    assert confused_groups(np.zeros((4, 4), np.int64), 3) == []


def test_pairs_count_both_ways_and_name_the_one_mistaken_more_often_first():
    matrix = np.array([[9, 1, 2], [4, 9, 0], [2, 0, 9]])
    assert confused_both_ways(matrix, 9) == [BothWays(1, 0, 4, 1), BothWays(0, 2, 2, 2)]
    assert len(confused_both_ways(matrix, 1)) == 1
